"""How is Ray reached or started, which workers fit, and what keeps a local Ray to its machine?"""
