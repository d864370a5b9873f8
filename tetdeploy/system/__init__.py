"""What a process finds and shares: the machine (`machine`), memory that is kept for the next step (`memory`), signals
(`signals`), the terminal (`standard_output`), and packages that may be missing (`extras`)."""
