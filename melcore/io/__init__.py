"""Files and programs outside: ISMRMRD raw data and images, BART's files and commands."""
