"""The Typer commands: parse, call one function of `api`, print. May import everything."""
