"""What every room may use: files, configuration, console, hub, device."""
