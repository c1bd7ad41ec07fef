"""What one training needs beside the network: its settings, loss, schedule, steps, and the folder of its run."""
