"""Training on Lightning's Trainer; the only place that imports lightning."""
