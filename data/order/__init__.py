"""Who trains what when? The order of all rows, by arithmetic alone."""
