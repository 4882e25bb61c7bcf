"""The commands of ``mclfast``; each module has HELP, add_arguments(parser) and run(known, rest)."""
