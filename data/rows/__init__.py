"""How does a worker get its rows? Ray Data's stream, windows, fixed rows of evaluation, framing, masking."""
