"""From predictions and drawn masks to figures: measures, scores with intervals, pictures."""
