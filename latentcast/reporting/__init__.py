"""One HTML file that says what runs did: ``folder.py`` reads run folders, ``page.py`` writes the file."""
