// Package apipb holds the messages and the service of the user's API, generated
// from api.proto.
package apipb

//go:generate protoc --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative --plugin=protoc-gen-go=../../../../bin/tools/protoc-gen-go --plugin=protoc-gen-go-grpc=../../../../bin/tools/protoc-gen-go-grpc api.proto
