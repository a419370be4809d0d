"""What a pipeline needs beside its transformer: the parts that lie in folders of their own."""
