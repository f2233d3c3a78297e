"""What every floor uses: checks of values and arguments, text files, the machine and its memory."""
