"""From probabilities to single nuclei: separated, outlined, measured, also in images too large to hold."""
