"""How fast can a machine or a GPU be, how much memory has it, what does it draw?"""
