"""Everything that exists once. Never imports node or torch; never runs user code."""
