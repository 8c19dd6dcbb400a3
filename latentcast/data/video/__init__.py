"""Video files, folders of them and pictures: read, written, shown. Knows nothing of the other rooms."""
