"""Result files to tables, curves and one page."""
