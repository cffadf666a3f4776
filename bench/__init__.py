"""What the package claims about speed, size and precision, each as one command: `python -m bench NAME`."""
