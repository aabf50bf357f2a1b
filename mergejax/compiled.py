"""Compiled programs that later processes take over."""

import os
import pathlib
import warnings


def user_folder() -> pathlib.Path:
    """Where a user's programs are kept between merges: $XDG_CACHE_HOME, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()
    return pathlib.Path(home) / "mergejax" / "programs"


def keep_in(folder: pathlib.Path) -> None:
    """Lets JAX keep what it compiles in a folder, and look there first.

    Results do not depend on it: an entry is found by the program, the compiler's version and
    options, and the processor's kind.
    """
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX writes entries in place: who meets one half written, or cannot write, compiles by himself.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
