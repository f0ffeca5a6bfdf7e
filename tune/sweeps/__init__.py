"""How does a sweep go? Phases, finalists, judgement, page."""
