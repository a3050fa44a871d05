"""The programs of a user, one a verb: arguments in, one call. `dash-train VERB` runs them, too."""
