"""How does a fine-tuning run go? Configuration, driver, worker, loop, end, page."""
