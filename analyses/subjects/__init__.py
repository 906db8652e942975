"""What questions are asked of: rows, models, methods and training runs."""
