"""The inputs that several analyses share: rows, models, methods, learning rates and training runs."""
