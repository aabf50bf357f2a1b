"""What models are worth: predictions, intervals, tables, pictures and the report."""
