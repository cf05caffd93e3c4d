"""Wan 2.1 / 2.2 in four steps, without ComfyUI. Importing it loads nothing."""
