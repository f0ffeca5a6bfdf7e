"""How are weights updated? Optimisers, schedule."""
