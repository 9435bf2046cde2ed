"""Help in plain text with the commands in groups, and errors that name the closest command."""

from typing import Any

import typer
import typer.core

from cvlab.registry import closest_match, unknown_name_error

TRAIN = "Train and evaluate"
PHOTOS = "Photos"
RUNS = "Runs"
RESOURCES = "Configurations, models and data"
MACHINE = "This machine"
GROUPS = (TRAIN, PHOTOS, RUNS, RESOURCES, MACHINE)


class CommandGroup(typer.core.TyperGroup):
    """A group of commands that prints its help, when it is called without a command."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands to the help, by group where the commands have one."""
        commands: list[tuple[str, Any]] = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        width = max(len(name) for name, _ in commands)
        for group in (*GROUPS, None):
            rows = [
                (name.ljust(width), command.get_short_help_str(formatter.width - width - 6))
                for name, command in commands
                if group == (command.rich_help_panel if command.rich_help_panel in GROUPS else None)
            ]
            if rows:
                with formatter.section(group or "Commands"):
                    formatter.write_dl(rows)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Print the help if there are no arguments and the group does nothing by itself."""
        if not args and not self.invoke_without_command:
            print(ctx.get_help())
            raise typer.Exit
        remaining: list[str] = super().parse_args(ctx, args)
        return remaining

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the arguments name. ConfigError if there is none."""
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise unknown_name_error("command", args[0], self.list_commands(ctx), f"{ctx.command_path} --help")
        return super().resolve_command(ctx, args)


class DefaultGroup(CommandGroup):
    """A group in which the command called `default` need not be named; a subclass decides which arguments are its."""

    default: str

    def is_for_default(self, args: list[str], commands: list[str]) -> bool:
        """Return whether arguments are those of the default command, given the names of all commands."""
        raise NotImplementedError

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default command where none is named."""
        if (args[0] if args else "") not in ctx.help_option_names and self.is_for_default(
            args, self.list_commands(ctx)
        ):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


class RunsGroup(DefaultGroup):
    """The commands about runs; without a command, `list`: `cvlab runs "status=done"` lists runs."""

    default = "list"

    def is_for_default(self, args: list[str], commands: list[str]) -> bool:  # noqa: ARG002
        """Return whether there is nothing, an option or a query."""
        first = args[0] if args else ""
        return not args or first.startswith("-") or any(c in first for c in "=<>~")


class BenchGroup(DefaultGroup):
    """The measurements; without a command, `steps`: `cvlab bench cifar_bn` measures a configuration."""

    default = "steps"

    def is_for_default(self, args: list[str], commands: list[str]) -> bool:
        """Return whether there is nothing, an option, or something that is not nearly the name of a command."""
        return not args or args[0].startswith("-") or closest_match(args[0], commands) is None
