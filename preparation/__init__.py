"""From downloads and drawn annotations to data sets that can be trained on."""
