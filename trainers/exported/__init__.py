"""How does a model lie in a folder that transformers loads, how is it read, and how does it write?"""
