"""From image files to batches: reading, splits, targets, the four resolutions, augmentation."""
