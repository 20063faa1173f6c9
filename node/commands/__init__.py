"""The command families of ``countersign``; each file is one. ``cli.py`` loads them when they are called."""
