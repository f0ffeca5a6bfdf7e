"""How does one trial run on Ray Tune, and what is kept of it?"""
