"""The sub-commands of ``dse-ext``, one a module; each imports what it needs when it runs."""
