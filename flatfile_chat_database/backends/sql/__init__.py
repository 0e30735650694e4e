"""The statements that make the tables of each database, numbered in the order in which they are run."""
