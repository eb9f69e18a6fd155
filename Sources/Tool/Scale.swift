import ArgumentParser
struct Scale: ParsableCommand { func run() throws {} }
