"""What is wrong with a trace? A catalogue of findings, noticed while a dump streams by or looked for afterwards."""
