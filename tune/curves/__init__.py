"""How many labels does pretraining save? Arms, draws, baselines, page."""
