"""What commands, data sets and trainers share: settings, errors, files, processes, tables."""
