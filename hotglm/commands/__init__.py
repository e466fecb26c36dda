"""The commands of the command line, one module each; `hotglm.cli` parses the words and dispatches."""
