"""The words of the command line: one file holds the settings and the job of one."""
