"""Studies of what the features are worth. They take minutes to hours and write one result each.

minimiser       which picture minimises the distance to several that may be the truth; seconds
probe           300 steps of fine-tuning, shift-tolerant LPIPS over PSNR; minutes
study           every objective and seed, the test pictures, docs/features.md; hours
start_network   the small super-resolution network that all of them start from
"""
