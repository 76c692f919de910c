"""What Python is given of plans and comparisons: objects that notebooks show, plot and make tables of."""
