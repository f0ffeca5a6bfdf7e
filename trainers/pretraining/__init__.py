"""How does a pretraining run go? Configuration, driver, worker, loop, samples and floor."""
