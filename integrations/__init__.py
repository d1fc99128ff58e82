"""Other people's packages on our operators. A module here imports the package that it is named after only when it is called."""
