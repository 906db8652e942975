"""How any question is asked."""
