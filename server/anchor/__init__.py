"""The coordinator's side of the anchor: everything here sees noised statistics only and is post-processing."""
