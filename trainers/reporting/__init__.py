"""What is a run seen by? Records, live metrics, progress, goodput, charts, the page."""
