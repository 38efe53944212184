"""The paper's Table 5: counts by formula, time and memory measured on this machine."""
