"""What the training of a supernet needs beside a host's trainer."""
