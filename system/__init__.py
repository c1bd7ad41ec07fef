"""What the machine and the shell give: options and errors, devices, memory, several processes, whole files."""
