"""Where the package meets training frameworks: one file each, which imports its framework only when it is used."""
