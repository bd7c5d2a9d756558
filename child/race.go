//go:build race

package child

// raced says that the program watches itself for data races, which takes more
// memory than any limit.
const raced = true
